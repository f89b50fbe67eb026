"""Where the rows of a forward and of a pass lie: ints and ids, no tensor and no device."""
