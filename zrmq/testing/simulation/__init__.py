"""A cluster simulator: real cores on a virtual clock, network and disk; one seed decides everything that happens."""
