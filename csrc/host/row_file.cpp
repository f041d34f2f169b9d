#include "row_file.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <stdexcept>
#include <system_error>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

namespace dre_fast {
namespace {

constexpr int64_t kPiece = 4 << 20;  // bytes of one system call: how soon close() is noticed

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

[[noreturn]] void fail(int code, const std::string& what) { throw std::system_error(code, std::generic_category(), what); }

}  // namespace

Pages::Pages(int64_t bytes, int fd) : bytes_(bytes) {
  if (bytes == 0) return;
  const int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
  void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
  if (found == MAP_FAILED) fail(errno, "mapping " + std::to_string(bytes) + " bytes");
  data_ = static_cast<char*>(found);
}

Pages::~Pages() {
  if (data_) munmap(data_, bytes_);
}

RowFile::RowFile(const std::string& folder, int64_t rows, int64_t row_bytes, int64_t ring_rows, int threads)
    : folder_(folder), row_bytes_(row_bytes), ring_rows_(ring_rows), owner_(getpid()) {
  if (rows < 0 || row_bytes < 1 || ring_rows < 0 || threads < 1)
    throw std::invalid_argument("RowFile: rows and ring_rows must not be negative, row_bytes and threads positive");
  ring_ = std::make_shared<Pages>(ring_rows * row_bytes, -1);
  std::string name = folder + "/.dre_fast-rows-XXXXXX";
  fd_ = mkostemp(name.data(), O_CLOEXEC);
  if (fd_ < 0) fail(errno, "making a row file in " + folder);
  unlink(name.c_str());
  try {
    reserve(rows);
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
  } catch (...) {
    close();
    ::close(fd_);
    throw;
  }
}

RowFile::~RowFile() {
  close();
  ::close(fd_);
}

void RowFile::reserve(int64_t rows) {
  // Space is taken now: a full disk is an error here, not a fault in the middle of a step.
  const int64_t bytes = rows * row_bytes_;
  if (rows > rows_) {
    const int status = posix_fallocate(fd_, rows_ * row_bytes_, bytes - rows_ * row_bytes_);
    if (status != 0) fail(status, "reserving " + std::to_string(bytes) + " bytes in " + folder_);
  }
  rows_ = std::max(rows, rows_);
}

// Before any lock: in a forked child a thread of the parent may hold it for ever.
void RowFile::check_process() const {
  if (getpid() != owner_) throw std::runtime_error("the row file belongs to another process: it does not survive a fork");
}

void RowFile::check_range(int64_t first, int64_t rows, int64_t limit, const char* what) const {
  if (first < 0 || rows < 0 || first > limit - rows)
    throw std::out_of_range(
        "rows " + std::to_string(first) + " .. " + std::to_string(first + rows - 1) + " lie outside the " +
        std::to_string(limit) + " rows of the " + what);
}

RowFile::Job RowFile::submit(std::function<void()> copy, std::vector<Job> after) {
  check_process();
  const std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) throw std::runtime_error("the row file is closed");
  const Job id = ++last_;
  pending_.insert(id);
  queue_.push_back({id, std::move(after), std::move(copy)});
  queued_.notify_one();
  return id;
}

RowFile::Job RowFile::read(int64_t first, int64_t rows, int64_t at, std::vector<Job> after) {
  check_range(first, rows, rows_, "file");
  check_range(at, rows, ring_rows_, "ring");
  auto copy = [this, first, rows, at] {
    char* to = ring_->data() + at * row_bytes_;
    int64_t offset = first * row_bytes_, left = rows * row_bytes_;
    while (left > 0) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (closed_) throw std::runtime_error("the row file was closed");
      }
      const ssize_t got = pread(fd_, to, std::min(left, kPiece), offset);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) fail(errno, "reading the row file in " + folder_);
      if (got == 0) fail(EIO, "the row file in " + folder_ + " was cut short");
      to += got;
      offset += got;
      left -= got;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    ++statistics_.reads;
    statistics_.bytes_read += rows * row_bytes_;
  };
  return submit(std::move(copy), std::move(after));
}

RowFile::Job RowFile::write(std::vector<int64_t> from, std::vector<int64_t> to, std::vector<Job> after) {
  if (from.size() != to.size()) throw std::invalid_argument("RowFile.write: from and to must have one length");
  for (const int64_t row : from) check_range(row, 1, ring_rows_, "ring");
  for (const int64_t row : to) check_range(row, 1, rows_, "file");
  auto copy = [this, from = std::move(from), to = std::move(to)] {
    size_t i = 0;
    while (i < from.size()) {
      size_t j = i + 1;  // neighbours in both places go in one call
      while (j < from.size() && from[j] == from[j - 1] + 1 && to[j] == to[j - 1] + 1) ++j;
      const char* source = ring_->data() + from[i] * row_bytes_;
      int64_t offset = to[i] * row_bytes_, left = static_cast<int64_t>(j - i) * row_bytes_;
      while (left > 0) {
        const ssize_t put = pwrite(fd_, source, std::min(left, kPiece), offset);
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) fail(errno, "writing the row file in " + folder_);
        source += put;
        offset += put;
        left -= put;
      }
      i = j;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    ++statistics_.writes;
    statistics_.bytes_written += static_cast<int64_t>(from.size()) * row_bytes_;
  };
  return submit(std::move(copy), std::move(after));
}

// Runs one job, without the lock, after those it waits for. They were queued before it and so began before it: the
// oldest job under way never waits.
void RowFile::settle(std::unique_lock<std::mutex>& lock, Task& task) {
  finished_.wait(lock, [&] {
    return closed_ || std::none_of(task.after.begin(), task.after.end(), [&](Job j) { return pending_.count(j) > 0; });
  });
  if (closed_) throw std::runtime_error("the row file was closed");
  for (const Job j : task.after) {
    const auto found = failed_.find(j);
    if (found != failed_.end()) std::rethrow_exception(found->second);
  }
  lock.unlock();
  const auto start = Clock::now();
  std::exception_ptr error;
  try {
    task.copy();
  } catch (...) {
    error = std::current_exception();
  }
  lock.lock();
  statistics_.busy_seconds += seconds_since(start);
  if (error) std::rethrow_exception(error);
}

void RowFile::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    queued_.wait(lock, [&] { return closed_ || !queue_.empty(); });
    if (queue_.empty()) return;
    Task task = std::move(queue_.front());
    queue_.pop_front();
    try {
      settle(lock, task);
    } catch (...) {
      failed_[task.id] = std::current_exception();
    }
    pending_.erase(task.id);
    finished_.notify_all();
  }
}

bool RowFile::done(Job job) {
  check_process();
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = failed_.find(job);
  if (found != failed_.end()) std::rethrow_exception(found->second);
  return pending_.count(job) == 0;
}

void RowFile::wait_for(const std::function<bool()>& ready, const std::function<void()>& interrupt) {
  const auto start = Clock::now();
  std::unique_lock<std::mutex> lock(mutex_);
  while (!finished_.wait_for(lock, std::chrono::milliseconds(50), ready)) {
    lock.unlock();
    interrupt();
    lock.lock();
  }
  statistics_.wait_seconds += seconds_since(start);
}

void RowFile::wait(Job job, const std::function<void()>& interrupt) {
  if (done(job)) return;
  wait_for([&] { return pending_.count(job) == 0; }, interrupt);
  done(job);
}

void RowFile::resize(int64_t rows, const std::function<void()>& interrupt) {
  check_process();
  wait_for([&] { return pending_.empty(); }, interrupt);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) throw std::runtime_error("the row file is closed");
  reserve(rows);
}

std::shared_ptr<Pages> RowFile::map() { return std::make_shared<Pages>(rows_ * row_bytes_, fd_); }

RowFile::Statistics RowFile::statistics() {
  check_process();
  const std::lock_guard<std::mutex> lock(mutex_);
  return statistics_;
}

void RowFile::close() {
  check_process();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
  }
  queued_.notify_all();
  finished_.notify_all();
  for (auto& thread : threads_) thread.join();
  threads_.clear();
}

}  // namespace dre_fast
