"""Hot paths of the zoo timed against plain implementations of the published procedures."""
