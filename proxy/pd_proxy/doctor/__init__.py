"""`pd-proxy doctor`: examines all engines, tries hand-offs between them, and reports what is wrong."""
