"""Label distillation: `dtcache label fit` and `dtcache label write`."""
