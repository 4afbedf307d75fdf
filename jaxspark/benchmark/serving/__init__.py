"""`jaxspark bench --suite=serving`: servers under load, as their clients see them."""
