"""The library that the chapters of The Logit Book import: one concept a module."""
