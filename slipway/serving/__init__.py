"""The model server: the process inside a replica."""
