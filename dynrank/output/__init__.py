"""Printed tables, and files that are written whole."""
