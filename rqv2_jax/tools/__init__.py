"""What serves engineers and no run: planning, benchmarks and the data doctor."""
