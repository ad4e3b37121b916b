/* Plays browsers: GETs one path over kept HTTP/1.1 connections, and counts whole answers.
 *
 *     cc -O2 -o http_load http_load.c
 *     http_load [-n REQUESTS] [-c CONNECTIONS] PORT PATH        on 127.0.0.1
 *
 * Prints the same line of JSON as load.c. Each answer must be a 200 with Content-Length.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct conn { int fd, have; long left; double since; char head[8192]; };  /* left: bytes of the body to come, or -1 */

static struct sockaddr_in where = {.sin_family = AF_INET};
static long total = 10000, conns = 16, started, done, errors;
static unsigned long long bytes;
static char ask[1024];
static double *latency;
static int ep;

static void fail(const char *what) { perror(what); exit(2); }
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}
static void next(struct conn *c) {
    c->have = 0, c->left = -1, c->since = now();
    started++;
    if (send(c->fd, ask, strlen(ask), MSG_NOSIGNAL) < 0 && errno != EPIPE && errno != ECONNRESET) fail("send");
}
static void start(struct conn *c) {
    int yes = 1;
    if ((c->fd = socket(AF_INET, SOCK_STREAM, 0)) < 0) fail("socket");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    if (connect(c->fd, (void *)&where, sizeof where)) fail("connect");
    struct epoll_event e = {EPOLLIN, {.ptr = c}};
    if (epoll_ctl(ep, EPOLL_CTL_ADD, c->fd, &e)) fail("epoll_ctl");
    next(c);
}
static int take(struct conn *c, char *p, long n) {  /* 1 once the answer is whole, -1 if it is none */
    bytes += n;
    if (c->left < 0) {
        if (n > (long)sizeof c->head - 1 - c->have) return -1;
        memcpy(c->head + c->have, p, n);
        c->head[c->have += n] = 0;
        char *end = strstr(c->head, "\r\n\r\n"), *length = strcasestr(c->head, "\nContent-Length:");
        if (!end) return 0;
        if (!length || length > end || strncmp(c->head, "HTTP/1.1 200", 12)) return -1;
        n = c->have - (end + 4 - c->head);
        c->left = atol(length + 16);
    }
    return (c->left -= n) < 0 ? -1 : !c->left;
}
static int ascending(const void *a, const void *b) { double d = *(double *)a - *(double *)b; return (d > 0) - (d < 0); }

int main(int argc, char **argv) {
    for (int o; (o = getopt(argc, argv, "n:c:")) != -1;) switch (o) {
        case 'n': total = atol(optarg); break;
        case 'c': conns = atol(optarg); break;
        default: return 2;
    }
    if (optind != argc - 2) { fprintf(stderr, "usage: http_load [-n N] [-c N] PORT PATH\n"); return 2; }
    where.sin_port = htons(atoi(argv[optind]));
    where.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    snprintf(ask, sizeof ask, "GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: load\r\nAccept: */*\r\n\r\n", argv[optind + 1]);
    latency = calloc(total, sizeof *latency);
    struct conn *all = calloc(conns, sizeof *all);
    static char buf[1 << 16];
    ep = epoll_create1(0);
    double since = now();
    for (long i = 0; i < conns && started < total; i++) start(&all[i]);
    while (done < total) {
        struct epoll_event ready[256];
        int n = epoll_wait(ep, ready, 256, 20000);
        if (!n) { fprintf(stderr, "no answer for 20 s\n"); errors += total - done; break; }
        for (int i = 0; i < n; i++) {
            struct conn *c = ready[i].data.ptr;
            long got = recv(c->fd, buf, sizeof buf, 0);
            int ok = got > 0 ? take(c, buf, got) : -1;
            if (!ok) continue;
            if (ok > 0) latency[done - errors] = now() - c->since; else errors++, close(c->fd);
            done++;
            if (started < total) { if (ok > 0) next(c); else start(c); }
        }
    }
    double seconds = (now() - since) / 1e6;
    long samples = done - errors;
    qsort(latency, samples, sizeof *latency, ascending);
    printf("{\"seconds\": %.6f, \"requests\": %ld, \"errors\": %ld, \"p50_us\": %.1f, \"p99_us\": %.1f, \"bytes\": %llu}\n",
           seconds, done, errors, samples > 0 ? latency[samples / 2] : 0, samples > 0 ? latency[samples * 99 / 100] : 0, bytes);
    return errors != 0;
}
