"""Seeded pictures: the plan, the pipeline, drawing, PNG records and the grid."""
