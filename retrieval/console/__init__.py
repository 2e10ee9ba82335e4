"""Terminal output that commands share: progress of runs, tables, texts, sizes and rates."""
