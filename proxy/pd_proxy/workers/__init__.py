"""Workers: several processes that serve as one gateway, and the state that they share."""
