// What the mock engine and the load client share; load.h says what each function is for.
#define _GNU_SOURCE
#include "load.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>

int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

void die(const char *doing) {
    fprintf(stderr, "load: %s: %s\n", doing, strerror(errno));
    exit(2);
}

// ---------------------------------------------------------------------------------------------------- options

void options_check(int argc, char **argv, const char *const *known) {
    for (int i = 2; i < argc; i += 2) {
        const char *const *name = known;
        while (*name && strcmp(*name, argv[i]) != 0) name++;
        if (!*name || i + 1 == argc) {
            fprintf(stderr, "load %s: %s %s\n", argv[1], argv[i], *name ? "lacks its value" : "is no option of it");
            exit(2);
        }
    }
}

const char *option_text(int argc, char **argv, const char *name, const char *otherwise) {
    for (int i = 2; i + 1 < argc; i += 2)
        if (strcmp(argv[i], name) == 0) return argv[i + 1];
    return otherwise;
}

long option_number(int argc, char **argv, const char *name, long otherwise, long least, long most) {
    const char *text = option_text(argc, argv, name, NULL);
    if (!text) return otherwise;
    char *rest;
    errno = 0;
    long number = strtol(text, &rest, 10);
    if (errno || rest == text || *rest || number < least || number > most) {
        fprintf(stderr, "load %s: %s %s: not a whole number from %ld to %ld\n", argv[1], name, text, least, most);
        exit(2);
    }
    return number;
}

// ---------------------------------------------------------------------------------------------------- sockets

static struct sockaddr_in loopback(long port) {
    return (struct sockaddr_in){
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

// Without TCP_NODELAY the kernel would hold back small events until the last one is acknowledged. An accepted
// connection inherits it from its listener.
static int tcp_socket(void) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), one = 1;
    if (fd < 0) die("open a socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

int listen_on_loopback(long port) {
    int fd = tcp_socket(), one = 1;
    struct sockaddr_in address = loopback(port);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 4096)) die("listen on the loopback port");
    return fd;
}

int connect_to_loopback(long port) {
    int fd = tcp_socket();
    struct sockaddr_in address = loopback(port);
    // A refusal that comes at once is left on the socket: the first read() reports it like any later one.
    if (connect(fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS && errno != ECONNREFUSED)
        die("connect to the loopback port");
    return fd;
}

// ---------------------------------------------------------------------------------------------------- buffers

size_t buffer_size(const Buffer *buffer) { return buffer->end - buffer->start; }

char *buffer_bytes(const Buffer *buffer) { return buffer->data + buffer->start; }

// Makes room for `size` more bytes, first by moving what is held to the front, then by growing.
static void buffer_reserve(Buffer *buffer, size_t size) {
    if (buffer->end + size <= buffer->capacity) return;
    size_t held = buffer_size(buffer);
    if (buffer->start) memmove(buffer->data, buffer_bytes(buffer), held);
    buffer->start = 0;
    buffer->end = held;
    if (held + size <= buffer->capacity) return;
    buffer->capacity = (held + size) * 2;
    buffer->data = realloc(buffer->data, buffer->capacity);
    if (!buffer->data) die("get memory");
}

void buffer_append(Buffer *buffer, const void *bytes, size_t size) {
    if (!size) return;
    buffer_reserve(buffer, size);
    memcpy(buffer->data + buffer->end, bytes, size);
    buffer->end += size;
}

void buffer_print(Buffer *buffer, const char *format, ...) {
    va_list values, again;
    va_start(values, format);
    va_copy(again, values);
    size_t size = (size_t)vsnprintf(NULL, 0, format, values);
    buffer_reserve(buffer, size + 1); // one more: vsnprintf ends with a zero byte, which is not counted as held
    vsnprintf(buffer->data + buffer->end, size + 1, format, again);
    buffer->end += size;
    va_end(again);
    va_end(values);
}

void buffer_clear(Buffer *buffer) { buffer->start = buffer->end = 0; }

void buffer_take(Buffer *buffer, size_t size) {
    buffer->start += size;
    if (buffer->start == buffer->end) buffer_clear(buffer);
}

void buffer_free(Buffer *buffer) {
    free(buffer->data);
    *buffer = (Buffer){0};
}

// ---------------------------------------------------------------------------------------------------- HTTP heads

Text http_header(Text head, const char *name) {
    size_t name_size = strlen(name);
    const char *line = head.at;
    while (line && line < head.end) {
        const char *end = memchr(line, '\n', (size_t)(head.end - line));
        if (!end) break;
        if ((size_t)(end - line) > name_size && line[name_size] == ':' && strncasecmp(line, name, name_size) == 0) {
            const char *value = line + name_size + 1;
            while (value < end && *value == ' ') value++;
            return (Text){value, end};
        }
        line = end + 1;
    }
    return (Text){NULL, NULL};
}

bool text_contains(Text text, const char *word) {
    size_t size = strlen(word);
    for (const char *at = text.at; at && at + size <= text.end; at++)
        if (strncasecmp(at, word, size) == 0) return true;
    return false;
}

long text_number(Text text, long otherwise) {
    long number = 0;
    const char *at = text.at;
    for (; at && at < text.end && *at >= '0' && *at <= '9' && number < LARGEST_MESSAGE; at++)
        number = number * 10 + (*at - '0');
    return at == text.at ? otherwise : number;
}

// ---------------------------------------------------------------------------------------------------- JSON

static const char *skip_space(const char *at, const char *end) {
    while (at < end && (*at == ' ' || *at == '\n' || *at == '\r' || *at == '\t')) at++;
    return at;
}

// From an opening quote to one past the closing one. Long prompts pass through here, hence memchr.
static const char *skip_string(const char *at, const char *end) {
    const char *first = at + 1, *quote = first;
    while (quote < end && (quote = memchr(quote, '"', (size_t)(end - quote)))) {
        const char *before = quote;
        while (before > first && before[-1] == '\\') before--;
        if ((quote - before) % 2 == 0) return quote + 1; // an even number of backslashes escapes itself, not the quote
        quote++;
    }
    return end;
}

static const char *skip_nested(const char *at, const char *end) {
    int depth = 0;
    while (at < end) {
        if (*at == '"') {
            at = skip_string(at, end);
            continue;
        }
        if (*at == '{' || *at == '[') depth++;
        if ((*at == '}' || *at == ']') && --depth == 0) return at + 1;
        at++;
    }
    return end;
}

static const char *skip_value(const char *at, const char *end) {
    if (at == end) return end;
    if (*at == '"') return skip_string(at, end);
    if (*at == '{' || *at == '[') return skip_nested(at, end);
    while (at < end && *at != ',' && *at != '}' && *at != ']') at++;
    return at;
}

Text json_member(Text object, const char *name) {
    const Text absent = {NULL, NULL};
    size_t name_size = strlen(name);
    if (!object.at) return absent;
    const char *end = object.end, *at = skip_space(object.at, end);
    if (at == end || *at != '{') return absent;
    at = skip_space(at + 1, end);
    while (at < end && *at == '"') {
        const char *key = at + 1;
        at = skip_string(at, end);
        bool found = (size_t)(at - key) == name_size + 1 && memcmp(key, name, name_size) == 0;
        at = skip_space(at, end);
        if (at == end || *at != ':') return absent;
        const char *value = skip_space(at + 1, end);
        at = skip_value(value, end);
        if (found) return (Text){value, at};
        at = skip_space(at, end);
        if (at == end || *at != ',') return absent;
        at = skip_space(at + 1, end);
    }
    return absent;
}

bool json_is_true(Text value) { return value.at && value.end - value.at >= 4 && memcmp(value.at, "true", 4) == 0; }

bool json_starts(Text value, char first) { return value.at && value.at < value.end && *value.at == first; }
