"""Accuracy of frozen or finetuned features on labelled images."""
