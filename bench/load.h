// What the mock engine and the load client share: the clock, options, growing buffers, and reading HTTP and JSON.
#ifndef LOAD_H
#define LOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { READ_BYTES = 256 * 1024, LARGEST_MESSAGE = 64 * 1024 * 1024 };

int run_engine(int argc, char **argv);
int run_client(int argc, char **argv);

// CLOCK_MONOTONIC in nanoseconds: one clock for every process of a machine, so an engine's send time and a client's
// receive time may be subtracted.
int64_t now_ns(void);

// Says what the system call did not do, and ends the program.
void die(const char *doing) __attribute__((noreturn));

// ---- options: `--name value` pairs after the command

// Ends the program when an option is not one of `known` (a NULL-terminated list) or lacks its value.
void options_check(int argc, char **argv, const char *const *known);
const char *option_text(int argc, char **argv, const char *name, const char *otherwise);
// A whole number in least..most; anything else ends the program.
long option_number(int argc, char **argv, const char *name, long otherwise, long least, long most);

// ---- sockets, on the loopback address only

int listen_on_loopback(long port);
int connect_to_loopback(long port);

// ---- a growing run of bytes: what is held lies in data[start..end)

typedef struct {
    char *data;
    size_t start, end, capacity;
} Buffer;

size_t buffer_size(const Buffer *buffer);
char *buffer_bytes(const Buffer *buffer);
void buffer_append(Buffer *buffer, const void *bytes, size_t size);
void buffer_print(Buffer *buffer, const char *format, ...) __attribute__((format(printf, 2, 3)));
void buffer_take(Buffer *buffer, size_t size); // forgets the first `size` bytes
void buffer_clear(Buffer *buffer);
void buffer_free(Buffer *buffer);

// ---- a run of bytes that somebody else owns: [at, end); at == NULL means absent

typedef struct {
    const char *at, *end;
} Text;

// The value of a header in an HTTP head, without leading spaces; the name is compared without case.
Text http_header(Text head, const char *name);
bool text_contains(Text text, const char *word); // without case
long text_number(Text text, long otherwise);

// The value of one member of the JSON object in `object`, as text. Strings and nested values are stepped over, so a
// prompt that spells a member's name does not deceive it.
Text json_member(Text object, const char *name);
bool json_is_true(Text value);
bool json_starts(Text value, char first); // '"': string, '[': array, '{': object

#endif
