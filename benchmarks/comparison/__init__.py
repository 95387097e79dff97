"""How `benchmarks.compare` trains, keeps and shows what `benchmarks.arms` define."""
