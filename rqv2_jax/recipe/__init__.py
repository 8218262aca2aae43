"""The run: its stages, its workdir, mining between them and evaluation at their ends."""
