"""`sso-lightning plan`: whether a run fits and how long it takes, before a weight is loaded.

A side room: the core imports nothing of it.
"""
