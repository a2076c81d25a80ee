"""Training of nextn-tiny, the small DeepSeek-V3.2-shaped checkpoint that ships with the package.

Independent of ``nextn.model`` on purpose: the two implementations check each other.
"""
