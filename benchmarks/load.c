/* Plays the web server: sends FastCGI requests as nginx would, and counts what comes back.
 *
 *     cc -O2 -o load load.c
 *     load [OPTIONS] PATH            of the Unix socket that the application listens on
 *
 *     -n N  requests in all (10000)               -c N  connections at a time (1)
 *     -k    keep connections                      -m N  requests at a time on each of them, multiplexed (1)
 *     -b N  bytes of STDIN (0)                    -r N  records that they are cut into (as few as can be)
 *     -p N  params (31, as nginx sends)           -q S  the query string (a=1&b=two)
 *     -s S  SCRIPT_FILENAME (/var/www/html/shop)
 *     -e N  bytes of STDOUT that must come back   -i N  more connections, kept and idle after one request each (0)
 *
 * Prints a line of JSON: seconds, requests, errors, p50_us, p99_us, bytes. A connection that ends in the middle of a
 * request is an error for each of its requests, and so is any END_REQUEST but FCGI_REQUEST_COMPLETE.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { BEGIN = 1, END = 3, PARAMS = 4, STDIN = 5, STDOUT = 6, MOST = 256 };

struct request { double since; long got; };
struct conn {
    int fd, idle, writing;        /* idle: it is one of -i, and has had its answer when idle == 2 */
    int busy, queued, first;      /* requests under way; those to be sent: a ring of ids, which begins at `first` */
    short ring[MOST];
    size_t sent;                  /* bytes of the first in the ring */
    unsigned char head[8], body[8];
    int have, type, id;           /* bytes of the record's header that are here; its type and id */
    long left, pad, at;           /* content and padding to come; bytes of content that came */
    struct request of[MOST + 1];  /* by id */
};

static struct sockaddr_un where = {.sun_family = AF_UNIX};
static long total = 10000, started, done, errors, samples, idle_answered;
static long conns = 1, keep, streams = 1, body, records, params = 31, want = -1, idle;
static const char *query = "a=1&b=two", *script = "/var/www/html/shop";
static unsigned char *wire[MOST + 1];  /* a whole request, by id */
static size_t wire_size;
static unsigned long long bytes;
static double *latency;
static int ep;

static void fail(const char *what) { perror(what); exit(2); }
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

/* The request */

static unsigned char *length(unsigned char *p, size_t n) {
    if (n > 127) { *p++ = 128 | n >> 24; *p++ = n >> 16; *p++ = n >> 8; }
    *p++ = n;
    return p;
}
static unsigned char *pair(unsigned char *p, const char *name, const char *value) {
    p = length(length(p, strlen(name)), strlen(value));
    p = mempcpy(p, name, strlen(name));
    return mempcpy(p, value, strlen(value));
}
static unsigned char *record(unsigned char *p, int type, int id, const void *content, size_t n) {
    size_t pad = -n & 7;  /* as nginx does */
    unsigned char head[8] = {1, type, id >> 8, id, n >> 8, n, pad, 0};
    p = mempcpy(p, head, 8);
    if (content) memcpy(p, content, n); else memset(p, 'x', n);
    memset(p + n, 0, pad);
    return p + n + pad;
}
static void build(int id) {
    char number[24], name[40];
    snprintf(number, sizeof number, "%ld", body);
    const char *usual[][2] = {
        {"QUERY_STRING", query}, {"REQUEST_METHOD", body ? "POST" : "GET"}, {"CONTENT_TYPE", body ? "image/png" : ""},
        {"CONTENT_LENGTH", body ? number : ""}, {"SCRIPT_NAME", "/shop"}, {"REQUEST_URI", "/shop/item/1234?a=1&b=two"},
        {"DOCUMENT_URI", "/shop/item/1234"}, {"DOCUMENT_ROOT", "/var/www/html"}, {"SERVER_PROTOCOL", "HTTP/2.0"},
        {"REQUEST_SCHEME", "https"}, {"HTTPS", "on"}, {"GATEWAY_INTERFACE", "CGI/1.1"},
        {"SERVER_SOFTWARE", "nginx/1.26.2"}, {"REMOTE_ADDR", "203.0.113.77"}, {"REMOTE_PORT", "40112"},
        {"SERVER_ADDR", "192.0.2.10"}, {"SERVER_PORT", "443"}, {"SERVER_NAME", "shop.example.org"},
        {"REDIRECT_STATUS", "200"}, {"SCRIPT_FILENAME", script}, {"PATH_INFO", "/item/1234"},
        {"HTTP_HOST", "shop.example.org"}, {"HTTP_ACCEPT_ENCODING", "gzip, deflate, br, zstd"},
        {"HTTP_USER_AGENT", "Mozilla/5.0 (Macintosh; Intel Mac OS X 10.15; rv:131.0) Gecko/20100101 Firefox/131.0"},
        {"HTTP_ACCEPT", "text/html,application/xhtml+xml,application/xml;q=0.9,image/webp,image/png,*/*;q=0.8"},
        {"HTTP_ACCEPT_LANGUAGE", "de-CH,de;q=0.8,en;q=0.5"}, {"HTTP_REFERER", "https://shop.example.org/search"},
        {"HTTP_COOKIE", "sid=6a5f0c1e9b7d4c33a8e2f1d0c9b8a7f6; cart=3; consent=all; ab=variant-2; lang=de; seen=1201,1187"},
        {"HTTP_SEC_FETCH_DEST", "document"}, {"HTTP_SEC_FETCH_MODE", "navigate"}, {"HTTP_SEC_FETCH_SITE", "same-origin"}};
    long known = sizeof usual / sizeof *usual;
    unsigned char *all = malloc(8192 + 64 * params), *end = all, *p;
    for (long i = 0; i < params; i++) {
        if (i < known) { end = pair(end, usual[i][0], usual[i][1]); continue; }
        snprintf(name, sizeof name, "HTTP_X_EXTRA_%ld", i);
        end = pair(end, name, "thirty-two bytes, as a token has");
    }
    long cuts = records ? records : (body + 65527) / 65528;
    p = wire[id] = malloc(64 + 2 * (end - all) + body + 16 * (cuts + 4));
    p = record(p, BEGIN, id, (unsigned char[8]){0, 1, keep}, 8);
    for (unsigned char *o = all; o < end; o += 65528) p = record(p, PARAMS, id, o, end - o < 65528 ? end - o : 65528);
    p = record(p, PARAMS, id, "", 0);
    for (long i = 0, at = 0; i < cuts; i++) {
        long stop = (i + 1) * body / cuts;
        p = record(p, STDIN, id, NULL, stop - at);
        at = stop;
    }
    p = record(p, STDIN, id, "", 0);
    wire_size = p - wire[id];
    free(all);
}

/* A connection */

static void watch(struct conn *c, int how) {
    struct epoll_event e = {EPOLLIN | (c->writing ? EPOLLOUT : 0), {.ptr = c}};
    if (epoll_ctl(ep, how, c->fd, &e)) fail("epoll_ctl");
}
static void ask(struct conn *c, int id) {
    c->ring[(c->first + c->queued++) % MOST] = id;
    c->of[id] = (struct request){now(), 0};
    c->busy++;
    if (!c->idle) started++;
}
static void push(struct conn *c) {
    int before = c->writing;
    c->writing = 0;
    while (c->queued) {
        ssize_t n = send(c->fd, wire[c->ring[c->first]] + c->sent, wire_size - c->sent, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0) { c->writing = errno == EAGAIN; break; }  /* of all else the next recv tells */
        if ((c->sent += n) < wire_size) continue;
        c->sent = 0;
        c->first = (c->first + 1) % MOST;
        c->queued--;
    }
    if (c->writing != before) watch(c, EPOLL_CTL_MOD);
}
static void start(struct conn *c) {
    int was = c->idle;
    memset(c, 0, sizeof *c);
    c->idle = was;
    if ((c->fd = socket(AF_UNIX, SOCK_STREAM, 0)) < 0) fail("socket");
    if (connect(c->fd, (void *)&where, sizeof where)) fail("connect");
    watch(c, EPOLL_CTL_ADD);
    for (int i = 1; i <= (c->idle ? 1 : streams) && (c->idle || started < total); i++) ask(c, i);
    push(c);
}
static void over(struct conn *c) {
    if (c->idle == 1) fail("an idle connection was closed before its answer");
    for (int i = 1; i <= streams; i++) if (c->of[i].since) done++, errors++;
    close(c->fd);
    c->fd = -1;
    if (!c->idle && started < total) start(c);
}
static int answered(struct conn *c) {  /* 0 if the connection is over now */
    struct request *r = &c->of[c->id];
    if (!r->since) return errors++, 1;
    int bad = c->body[4] || !r->got || (want >= 0 && r->got != want);
    if (!bad && !c->idle) latency[samples++] = now() - r->since;
    r->since = 0;
    c->busy--;
    if (c->idle) { c->idle = 2; idle_answered++; return 1; }
    errors += bad;
    done++;
    if (!keep) return 0;
    if (started < total) ask(c, c->id);
    return 1;
}
static int parse(struct conn *c, const unsigned char *p, long n) {  /* 0 if the connection is over now */
    while (n) {
        long take;
        if (c->have < 8) {
            take = n < 8 - c->have ? n : 8 - c->have;
            memcpy(c->head + c->have, p, take);
            if ((c->have += take) == 8) {
                if (c->head[0] != 1) return 0;
                c->type = c->head[1], c->id = c->head[2] << 8 | c->head[3];
                if (c->id > streams) return 0;
                c->left = c->head[4] << 8 | c->head[5], c->pad = c->head[6], c->at = 0;
            }
        } else if (c->left) {
            take = n < c->left ? n : c->left;
            if (c->type == STDOUT) c->of[c->id].got += take, bytes += take;
            if (c->type == END) for (long i = 0; i < take && c->at + i < 8; i++) c->body[c->at + i] = p[i];
            c->at += take, c->left -= take;
        } else c->pad -= take = n < c->pad ? n : c->pad;
        p += take, n -= take;
        if (c->have < 8 || c->left || c->pad) continue;
        c->have = 0;
        if (c->type == END && !answered(c)) return 0;
    }
    return 1;
}
static void turn(long until_idle) {
    static unsigned char buf[1 << 18];
    struct epoll_event ready[256];
    while (until_idle ? idle_answered < idle : done < total) {
        int n = epoll_wait(ep, ready, 256, 20000);
        if (!n) { fprintf(stderr, "no answer for 20 s\n"); errors += total - done; return; }
        for (int i = 0; i < n; i++) {
            struct conn *c = ready[i].data.ptr;
            if (c->fd < 0) continue;
            if (ready[i].events & EPOLLOUT) push(c);
            if (!(ready[i].events & ~EPOLLOUT)) continue;
            ssize_t got = recv(c->fd, buf, sizeof buf, MSG_DONTWAIT);
            if (got < 0 && errno == EAGAIN) continue;
            if (got <= 0 || !parse(c, buf, got)) over(c); else if (c->queued) push(c);
        }
    }
}

static int ascending(const void *a, const void *b) { double d = *(double *)a - *(double *)b; return (d > 0) - (d < 0); }

int main(int argc, char **argv) {
    for (int o; (o = getopt(argc, argv, "n:c:km:b:r:p:q:s:e:i:")) != -1;) switch (o) {
        case 'n': total = atol(optarg); break;
        case 'c': conns = atol(optarg); break;
        case 'k': keep = 1; break;
        case 'm': streams = atol(optarg); break;
        case 'b': body = atol(optarg); break;
        case 'r': records = atol(optarg); break;
        case 'p': params = atol(optarg); break;
        case 'q': query = optarg; break;
        case 's': script = optarg; break;
        case 'e': want = atol(optarg); break;
        case 'i': idle = atol(optarg); break;
        default: return 2;
    }
    if (optind != argc - 1 || streams < 1 || streams > MOST || (streams > 1 && !keep) || (idle && !keep)) {
        fprintf(stderr, "usage: load [-n N] [-c N] [-k [-m N] [-i N]] [-b N] [-r N] [-p N] [-q S] [-s S] [-e N] PATH\n");
        return 2;
    }
    strncpy(where.sun_path, argv[optind], sizeof where.sun_path - 1);
    if (conns > total) conns = total;
    for (int i = 1; i <= streams; i++) build(i);
    latency = calloc(total, sizeof *latency);
    struct conn *all = calloc(idle + conns, sizeof *all);
    ep = epoll_create1(0);
    for (long i = 0; i < idle; i++) all[i].idle = 1, start(&all[i]);
    turn(1);
    double since = now();
    for (long i = 0; i < conns; i++) start(&all[idle + i]);
    turn(0);
    double seconds = (now() - since) / 1e6;
    qsort(latency, samples, sizeof *latency, ascending);
    printf("{\"seconds\": %.6f, \"requests\": %ld, \"errors\": %ld, \"p50_us\": %.1f, \"p99_us\": %.1f, \"bytes\": %llu}\n",
           seconds, done, errors, samples ? latency[samples / 2] : 0, samples ? latency[samples * 99 / 100] : 0, bytes);
    return errors != 0;
}
