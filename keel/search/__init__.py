"""Search at test time: more compute for one answer."""
