"""Tests of `coar`, one file per module, with slow references (`naive`) and small models (`cases`)."""
