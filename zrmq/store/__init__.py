"""The broker's memory on disk: one commit log, and views of it that can be rebuilt. The only package that knows its files."""
