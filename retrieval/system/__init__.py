"""The operating system: files that survive a crash, locks, paths, threads and processes."""
