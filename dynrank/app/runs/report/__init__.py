"""A finished run as one page, ``report.html``, made of the files in the run's folder alone."""
