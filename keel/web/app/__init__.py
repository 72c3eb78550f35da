"""The labelling app's routes and pages over keel.web.service."""
