"""Printed tables, pictures and files."""
