"""What work takes: counts of it, a model that learns their time with a bound, and what no plan foresees."""
