"""Pictures of studies, evaluations and edits."""
