"""The local platform: processes on this machine under supervisord, behind nginx."""
