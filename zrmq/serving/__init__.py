"""The broker's core: requests in, log entries and replies out. No socket, no thread, no clock of its own."""
