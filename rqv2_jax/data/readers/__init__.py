"""Readers, a module for each file format; all return a `data.collection.Collection`.

A missing file raises `InputError` when the folder is opened, a bad line when it is reached.
"""
