"""For tests, ours and users': a clock to turn, a disk that breaks, a network in memory."""
