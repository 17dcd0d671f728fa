"""Runs, data and weights in a bucket; `files` says where it is used."""
