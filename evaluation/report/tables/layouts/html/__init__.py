"""A table as one HTML page that needs no network: its parts are the real files beside this one."""
