"""The commands of ``mebp``, a module each: ``add_flags`` declares a command's flags, and ``run`` does its work.

Importing these modules imports no torch, so that help and a mistyped flag are answered at once.
"""
