// The load client: keeps streams open against 127.0.0.1, checks every answer to its end, and prints one line of JSON.
//
//   --port P            where the gateway (or an engine) listens
//   --concurrency C     streams open at once
//   --requests N        answers to take in all
//   --tokens M          tokens to ask for; an answer with another count is bad
//   --prompt-bytes B    size of the prompt
//   --differ-at B       the byte of the prompt at which the request's number is written; -1 (default): every request has
//                       the same prompt, which is the best case of a prefix cache
//   --prefixes N        what is before that byte begins in N ways, which requests have in turn (1)
//   --first N           number of the first request (0)
//   --rate R            requests a second, evenly spaced; 0: a new one whenever one ends. With a rate, times count from
//                       when a request was due, so that a slow gateway cannot hide by delaying the next one
//   --path PATH         /v1/chat/completions (default) or /v1/completions
//   --timeout-s S       what is not finished by then is reported as unfinished
//   --keep-alive 0|1    whether a stream's connection serves its next request too
//
// An answer is ok when its status is 200, every token came, the usage event tells their count, and it ended with
// [DONE] and a complete HTTP body. Token delay: from the time written in the token by the engine to its receipt here.
#define _GNU_SOURCE
#include "load.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <unistd.h>

enum { MOST_PROMPT = 16 * 1024 * 1024, DIGITS = 8 };
enum { MOST_STREAMS = 16384, MOST_REQUESTS = 1000000, MOST_TOKENS = 100000, MOST_SAMPLES = 20 * 1000 * 1000 };

typedef enum { HEAD, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER, SIZED_DATA, DATA_UNTIL_CLOSE, COMPLETE } Part;

typedef struct {
    int fd; // -1: no connection
    bool busy, done, usage_right, close_after;
    Part part;    // which part of the answer is read next
    size_t need;  // bytes that are left of this part
    size_t sent;  // bytes of the request
    int status;   // 0: no head was read
    long tokens;  // received so far
    long number;  // of the request
    int64_t start_ns;
    Buffer in, body;
} Stream;

// A list of microseconds, of fixed capacity; what does not fit (an answer with too many tokens) is not kept.
typedef struct {
    uint32_t *us;
    long count, capacity;
} Samples;

static struct {
    int epoll;
    long port, concurrency, requests, tokens, rate;
    bool keep_alive;
    Buffer request;
    char *prompt; // within `request`
    long differ_at, prefixes, first;
    Stream *streams;
    int64_t start_ns;
    long started, finished, ok, bad, tokens_seen;
    long statuses[600];
    bool told_failure;
    Samples token_delay, ttft, whole;
} client;

// ---------------------------------------------------------------------------------------------------- samples

static Samples samples_for(long capacity) {
    Samples samples = {malloc((size_t)capacity * sizeof(uint32_t)), 0, capacity};
    if (!samples.us) die("get memory");
    return samples;
}

static void keep(Samples *samples, int64_t ns) {
    if (samples->count < samples->capacity) samples->us[samples->count++] = ns > 0 ? (uint32_t)(ns / 1000) : 0;
}

static int by_size(const void *one, const void *other) {
    uint32_t a = *(const uint32_t *)one, b = *(const uint32_t *)other;
    return (a > b) - (a < b);
}

static void print_percentiles(const char *name, Samples *samples) {
    static const double shares[] = {0.5, 0.9, 0.99, 0.999, 1};
    static const char *const names[] = {"p50", "p90", "p99", "p999", "max"};
    qsort(samples->us, (size_t)samples->count, sizeof *samples->us, by_size);
    printf("\"%s\":{\"count\":%ld", name, samples->count);
    for (int i = 0; i < 5; i++) {
        long place = (long)(shares[i] * (double)(samples->count - 1));
        printf(",\"%s\":%u", names[i], samples->count ? samples->us[place] : 0);
    }
    printf("},");
}

// ---------------------------------------------------------------------------------------------------- events

// One line of an event stream. A token is known by the send time in its text: `" @<nanoseconds>`.
static void take_line(Stream *stream, const char *line, size_t size, int64_t now) {
    static const char mark[] = "\" @";
    if (size < 5 || memcmp(line, "data:", 5) != 0) return;
    const char *token = memmem(line, size, mark, sizeof mark - 1);
    if (token) {
        if (stream->tokens++ == 0) keep(&client.ttft, now - stream->start_ns);
        client.tokens_seen++;
        keep(&client.token_delay, now - strtoll(token + sizeof mark - 1, NULL, 10));
    } else if (memmem(line, size, "[DONE]", 6)) {
        stream->done = true;
    } else {
        Text event = {memchr(line, '{', size), line + size};
        long told = text_number(json_member(json_member(event, "usage"), "completion_tokens"), -1);
        if (told >= 0) stream->usage_right = told == client.tokens;
    }
}

static void take_lines(Stream *stream, int64_t now) {
    const char *end;
    Buffer *body = &stream->body;
    while (buffer_size(body) && (end = memchr(buffer_bytes(body), '\n', buffer_size(body)))) {
        const char *line = buffer_bytes(body);
        take_line(stream, line, (size_t)(end - line), now);
        buffer_take(body, (size_t)(end + 1 - line));
    }
}

// ---------------------------------------------------------------------------------------------------- answers

// Takes the head of the answer out of the buffer once it is there, and sets what follows.
static bool take_head(Stream *stream) {
    char *start = buffer_bytes(&stream->in);
    char *end = memmem(start, buffer_size(&stream->in), "\r\n\r\n", 4);
    if (!end) return false;
    Text head = {start, end + 4};
    Text length = http_header(head, "content-length");
    stream->status = head.end - head.at > 12 ? atoi(start + 9) : 0;
    Text version = {start, start + 8}; // HTTP/1.0 closes without saying so
    stream->close_after = text_contains(http_header(head, "connection"), "close") || text_contains(version, "HTTP/1.0");
    if (text_contains(http_header(head, "transfer-encoding"), "chunked")) {
        stream->part = CHUNK_SIZE;
    } else if (length.at) {
        stream->need = (size_t)text_number(length, 0);
        stream->part = stream->need ? SIZED_DATA : COMPLETE;
    } else {
        stream->part = DATA_UNTIL_CLOSE;
        stream->need = SIZE_MAX;
    }
    buffer_take(&stream->in, (size_t)(head.end - head.at));
    return true;
}

// A line of the chunked framing: a chunk's size, or a trailer (the empty one ends the answer).
static bool take_framing_line(Stream *stream) {
    char *start = buffer_bytes(&stream->in), *end = memchr(start, '\n', buffer_size(&stream->in));
    if (!end) return false;
    if (stream->part == CHUNK_SIZE) {
        stream->need = strtoul(start, NULL, 16);
        stream->part = stream->need ? CHUNK_DATA : TRAILER;
    } else if (end - start <= 1) {
        stream->part = COMPLETE;
    }
    buffer_take(&stream->in, (size_t)(end + 1 - start));
    return true;
}

static bool take_data(Stream *stream, int64_t now) {
    size_t size = buffer_size(&stream->in) < stream->need ? buffer_size(&stream->in) : stream->need;
    buffer_append(&stream->body, buffer_bytes(&stream->in), size);
    buffer_take(&stream->in, size);
    stream->need -= size;
    if (stream->need == 0) stream->part = stream->part == CHUNK_DATA ? CHUNK_END : COMPLETE;
    take_lines(stream, now);
    return true;
}

static bool take_chunk_end(Stream *stream) {
    if (buffer_size(&stream->in) < 2) return false;
    buffer_take(&stream->in, 2);
    stream->part = CHUNK_SIZE;
    return true;
}

// Takes one part of the answer; says whether there may be more to take.
static bool take_part(Stream *stream, int64_t now) {
    if (stream->part == COMPLETE || buffer_size(&stream->in) == 0) return false;
    switch (stream->part) {
    case HEAD: return take_head(stream);
    case CHUNK_SIZE:
    case TRAILER: return take_framing_line(stream);
    case CHUNK_END: return take_chunk_end(stream);
    default: return take_data(stream, now);
    }
}

// ---------------------------------------------------------------------------------------------------- requests

static void watch(Stream *stream, int operation, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = stream};
    epoll_ctl(client.epoll, operation, stream->fd, &event);
}

static void disconnect(Stream *stream) {
    if (stream->fd >= 0) close(stream->fd);
    stream->fd = -1;
}

static void begin(Stream *stream, int64_t due_ns) {
    *stream = (Stream){.fd = stream->fd, .busy = true, .start_ns = due_ns, .in = stream->in, .body = stream->body};
    buffer_clear(&stream->in);
    buffer_clear(&stream->body);
    stream->number = client.first + client.started++;
    if (stream->fd >= 0) {
        watch(stream, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
        return;
    }
    stream->fd = connect_to_loopback(client.port);
    watch(stream, EPOLL_CTL_ADD, EPOLLIN | EPOLLOUT);
}

// The first failure is told on stderr: the counts alone do not say what went wrong.
static void tell_failure(const Stream *stream, const char *end) {
    if (client.told_failure) return;
    client.told_failure = true;
    fprintf(stderr, "load client: first bad answer: status %d, %ld of %ld tokens, %s, usage %s, %s: %.*s\n",
            stream->status, stream->tokens, client.tokens, stream->done ? "[DONE]" : "no [DONE]",
            stream->usage_right ? "right" : "missing or wrong", end, (int)(buffer_size(&stream->body) % 400),
            buffer_size(&stream->body) ? buffer_bytes(&stream->body) : "");
}

static void finish(Stream *stream, bool complete) {
    bool ok = complete && stream->status == 200 && stream->done && stream->usage_right &&
              stream->tokens == client.tokens;
    if (!ok) tell_failure(stream, complete ? "complete" : "connection lost");
    *(ok ? &client.ok : &client.bad) += 1;
    if (stream->status >= 0 && stream->status < 600) client.statuses[stream->status]++;
    keep(&client.whole, now_ns() - stream->start_ns);
    stream->busy = false;
    client.finished++;
    if (!complete || stream->close_after || !client.keep_alive) disconnect(stream);
    if (!client.rate && client.started < client.requests) begin(stream, now_ns());
}

// With a rate: starts what is due, as far as there are idle streams.
static void begin_due(void) {
    int64_t gap_ns = 1000000000LL / client.rate;
    long due = (long)((now_ns() - client.start_ns) / gap_ns) + 1;
    if (due > client.requests) due = client.requests;
    for (long i = 0; i < client.concurrency && client.started < due; i++)
        if (!client.streams[i].busy) begin(&client.streams[i], client.start_ns + client.started * gap_ns);
}

// ---------------------------------------------------------------------------------------------------- sockets

static void write_number(char *at, long number) {
    for (int place = DIGITS - 1; place >= 0; place--, number /= 16) at[place] = "0123456789abcdef"[number % 16];
}

// Makes the request that all streams send from the stream's own. The kernel copies what is written, so a stream that
// sends its request in several parts only has to do this before each.
static void number_prompt(const Stream *stream) {
    if (client.differ_at > 0) write_number(client.prompt, stream->number % client.prefixes);
    if (client.differ_at >= 0) write_number(client.prompt + client.differ_at, stream->number);
}

static void send_request(Stream *stream) {
    number_prompt(stream);
    size_t left = buffer_size(&client.request) - stream->sent;
    ssize_t written = left ? write(stream->fd, buffer_bytes(&client.request) + stream->sent, left) : 0;
    if (written > 0) stream->sent += (size_t)written;
    if (stream->sent == buffer_size(&client.request)) watch(stream, EPOLL_CTL_MOD, EPOLLIN);
}

// Reads once: epoll reports what is left again, and other streams have their turn in between.
static void receive(Stream *stream) {
    static char bytes[READ_BYTES];
    ssize_t size = read(stream->fd, bytes, sizeof bytes);
    int64_t now = now_ns();
    if (size < 0 && errno == EAGAIN) return;
    if (size <= 0) {
        bool complete = size == 0 && stream->part == DATA_UNTIL_CLOSE;
        disconnect(stream);
        if (stream->busy) finish(stream, complete);
        return;
    }
    if (!stream->busy) { // bytes that nobody asked for
        disconnect(stream);
        return;
    }
    buffer_append(&stream->in, bytes, (size_t)size);
    while (take_part(stream, now)) {}
    if (stream->part == COMPLETE) finish(stream, true);
    else if (buffer_size(&stream->in) + buffer_size(&stream->body) > LARGEST_MESSAGE) finish(stream, false);
}

// ---------------------------------------------------------------------------------------------------- the program

// The one request that every stream sends, but for the numbers in its prompt. The prompt is words of five letters, so
// that it needs no escaping.
static void write_request(const char *path, long prompt_bytes) {
    Buffer body = {0};
    bool chat = strstr(path, "chat") != NULL;
    const char *opening = chat ? "\"messages\":[{\"role\":\"user\",\"content\":\"" : "\"prompt\":\"";
    buffer_print(&body, "{\"model\":\"m\",%s", opening);
    size_t before = buffer_size(&body);
    for (long i = 0; i < prompt_bytes; i++) {
        char letter = i % 6 == 5 ? ' ' : (char)('a' + i * 7 % 26);
        buffer_append(&body, &letter, 1);
    }
    buffer_print(&body,
                 "%s,\"max_tokens\":%ld,\"stream\":true,\"stream_options\":{\"include_usage\":true},\"temperature\":0}",
                 chat ? "\"}]" : "\"", client.tokens);
    buffer_print(&client.request,
                 "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%ld\r\nContent-Type: application/json\r\n"
                 "Accept: text/event-stream\r\n%sContent-Length: %zu\r\n\r\n",
                 path, client.port, client.keep_alive ? "" : "Connection: close\r\n", buffer_size(&body));
    size_t head = buffer_size(&client.request);
    buffer_append(&client.request, buffer_bytes(&body), buffer_size(&body));
    client.prompt = buffer_bytes(&client.request) + head + before;
    buffer_free(&body);
}

static void read_options(int argc, char **argv) {
    static const char *const known[] = {"--port", "--concurrency", "--requests", "--tokens",     "--prompt-bytes",
                                        "--rate", "--path",        "--timeout-s", "--keep-alive", "--differ-at",
                                        "--prefixes", "--first",   NULL};
    options_check(argc, argv, known);
    client.port = option_number(argc, argv, "--port", 0, 1, 65535);
    client.concurrency = option_number(argc, argv, "--concurrency", 64, 1, MOST_STREAMS);
    client.requests = option_number(argc, argv, "--requests", 1000, 1, MOST_REQUESTS);
    client.tokens = option_number(argc, argv, "--tokens", 64, 1, MOST_TOKENS);
    client.rate = option_number(argc, argv, "--rate", 0, 0, 100000);
    client.keep_alive = option_number(argc, argv, "--keep-alive", 1, 0, 1) == 1;
    if (client.requests * client.tokens > MOST_SAMPLES) {
        fprintf(stderr, "load client: --requests times --tokens is more than %d\n", MOST_SAMPLES);
        exit(2);
    }
    long prompt_bytes = option_number(argc, argv, "--prompt-bytes", 1000, 0, MOST_PROMPT);
    client.differ_at = option_number(argc, argv, "--differ-at", -1, -1, MOST_PROMPT);
    client.prefixes = option_number(argc, argv, "--prefixes", 1, 1, MOST_REQUESTS);
    client.first = option_number(argc, argv, "--first", 0, 0, 1000 * MOST_REQUESTS);
    if (client.differ_at >= 0 && client.differ_at + DIGITS > prompt_bytes) {
        fprintf(stderr, "load client: --prompt-bytes %ld: no room for a number at byte %ld\n", prompt_bytes,
                client.differ_at);
        exit(2);
    }
    if (client.differ_at > 0 && client.differ_at < DIGITS) {
        fprintf(stderr, "load client: --differ-at %ld: neither 0 nor behind the %d bytes that tell prefixes apart\n",
                client.differ_at, DIGITS);
        exit(2);
    }
    write_request(option_text(argc, argv, "--path", "/v1/chat/completions"), prompt_bytes);
}

static void drive(int64_t end_ns) {
    struct epoll_event events[512];
    for (long i = 0; !client.rate && i < client.concurrency && client.started < client.requests; i++)
        begin(&client.streams[i], now_ns());
    while (client.finished < client.requests && now_ns() < end_ns) {
        if (client.rate) begin_due();
        int count = epoll_wait(client.epoll, events, 512, client.rate ? 1 : 100);
        for (int i = 0; i < count; i++) {
            Stream *stream = events[i].data.ptr;
            if (stream->busy && events[i].events & EPOLLOUT) send_request(stream);
            if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(stream);
        }
    }
}

static double cpu_seconds(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
           (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static void report(double seconds) {
    printf("{\"ok\":%ld,\"bad\":%ld,\"unfinished\":%ld,\"seconds\":%.3f,\"tokens\":%ld,\"tokens_per_s\":%.1f,"
           "\"requests_per_s\":%.1f,",
           client.ok, client.bad, client.requests - client.finished, seconds, client.tokens_seen,
           (double)client.tokens_seen / seconds, (double)client.finished / seconds);
    print_percentiles("token_delay_us", &client.token_delay);
    print_percentiles("ttft_us", &client.ttft);
    print_percentiles("whole_us", &client.whole);
    printf("\"client_cpu_s\":%.3f,\"status\":{", cpu_seconds());
    const char *comma = "";
    for (int status = 0; status < 600; status++) {
        if (!client.statuses[status]) continue;
        printf("%s\"%d\":%ld", comma, status, client.statuses[status]);
        comma = ",";
    }
    printf("}}\n");
}

int run_client(int argc, char **argv) {
    read_options(argc, argv);
    long timeout_s = option_number(argc, argv, "--timeout-s", 120, 1, 3600);
    client.token_delay = samples_for(client.requests * client.tokens);
    client.ttft = samples_for(client.requests);
    client.whole = samples_for(client.requests);
    client.epoll = epoll_create1(EPOLL_CLOEXEC);
    client.streams = calloc((size_t)client.concurrency, sizeof *client.streams);
    if (client.epoll < 0 || !client.streams) die("prepare the streams");
    for (long i = 0; i < client.concurrency; i++) client.streams[i].fd = -1;
    client.start_ns = now_ns();
    drive(client.start_ns + timeout_s * 1000000000LL);
    report((double)(now_ns() - client.start_ns) / 1e9);
    return 0;
}
