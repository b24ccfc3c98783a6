"""The stages of section 6.1: each reads plain files and writes one folder."""
