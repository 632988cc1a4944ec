"""The NameServer's core: which brokers live, which queues they have, and who waits to hear of changes."""
