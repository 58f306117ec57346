"""Floor 0: what every floor uses. User errors, the config base class, and keyed random numbers."""
