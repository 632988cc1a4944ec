"""One module for each peer: how its server is started, and how a competent program uses its client."""
