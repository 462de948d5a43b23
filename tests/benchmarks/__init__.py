"""What the course promises about speed, measured as ratios: ``make bench`` runs every ``bench_*.py`` of this folder."""
