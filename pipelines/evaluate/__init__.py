"""`dtcache evaluate`: accuracy of frozen or finetuned features on labelled images."""
