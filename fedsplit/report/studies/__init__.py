"""Many runs side by side: one table, figures, protocols, a page. Needs pandas (extra ``study``)."""
