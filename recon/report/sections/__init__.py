"""The page's sections: a file each, beside the template of its name."""
