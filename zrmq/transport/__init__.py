"""Frames between processes: the reactor, server and client ends, and an in-memory twin. The only importer of zmq."""
