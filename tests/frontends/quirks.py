"""What front ends cannot do, or do in their own way: the tests hold them to it, `nbs/05_frontends.ipynb` shows it."""

REUSES = {"nginx-keepalive", "apache-proxy-fcgi-reuse", "h2o-keepalive", "haproxy", "haproxy-mpxs", "haproxy-getvalues"}
BUFFERS = {"lighttpd", "caddy-php", "apache-proxy-fcgi", "apache-proxy-fcgi-handler"}  # pass on whole answers
ASKED = {"nginx", "nginx-keepalive"}  # do so too, unless the answer's X-Accel-Buffering says no
STORES = {"nginx", "nginx-keepalive", "lighttpd", "h2o", "h2o-keepalive"}  # an upload is there before it is sent on
NOT_SPLIT = {"apache-proxy-fcgi", "apache-proxy-fcgi-reuse", "h2o", "h2o-keepalive"}  # SCRIPT_NAME or PATH_INFO is all

# When a handler is told that the client has left. `at once` is within 100 ms; else it goes on and learns it `writing`,
# as nobody takes its output, or `never`, as the front end takes all of it. An upload that is `stored` never gets there.
TOLD = {  # while it                 thinks,    answers,   reads
    "caddy":                     ("writing", "writing", "at once"),
    "caddy-php":                 ("writing", "writing", "at once"),
    "nginx":                     ("at once", "at once", "stored"),
    "nginx-keepalive":           ("at once", "at once", "stored"),
    "nginx-unbuffered":          ("at once", "at once", "at once"),
    "lighttpd":                  ("never",   "never",   "stored"),
    "lighttpd-stream":           ("writing", "writing", "at once"),
    "apache-proxy-fcgi":         ("writing", "writing", "at once"),
    "apache-proxy-fcgi-reuse":   ("writing", "writing", "at once"),
    "apache-proxy-fcgi-handler": ("writing", "writing", "at once"),
    "h2o":                       ("writing", "writing", "stored"),
    "h2o-keepalive":             ("writing", "writing", "stored"),
    "haproxy":                   ("writing", "writing", "at once"),
    "haproxy-nokeep":            ("writing", "writing", "at once"),
    "haproxy-mpxs":              ("writing", "writing", "at once"),
    "haproxy-getvalues":         ("writing", "writing", "at once")}
MOMENTS = "thinks", "answers", "reads"
