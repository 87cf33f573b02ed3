"""Is it gone, and is the rest still there: suites drawn and judged, attacks, reports, tuning."""
