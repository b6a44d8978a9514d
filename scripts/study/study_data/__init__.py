"""The data of the study's tasks; their configuration is in conf/, beside this package."""
