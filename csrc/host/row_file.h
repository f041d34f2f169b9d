// Rows of a memory bank in a file, and a ring of them in memory: a pool of threads copies between the two.
//
// The file is scratch space: it has no name from the moment it is made, so nothing stays behind a killed process. Which
// slide lies where in the ring, and what may be overwritten, is decided by dre_fast/nn/bank_ring.py; this class moves
// bytes in the order it is told to.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include <sys/types.h>
#include <unistd.h>

namespace dre_fast {

// Pages from mmap, given back with the last owner.
class Pages {
 public:
  Pages(int64_t bytes, int fd);  // fd -1: anonymous memory, zeros
  ~Pages();
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  int64_t bytes_;
};

class RowFile {
 public:
  using Job = int64_t;

  struct Statistics {
    int64_t reads = 0, writes = 0, bytes_read = 0, bytes_written = 0;
    double busy_seconds = 0, wait_seconds = 0;  // of all threads copying; of callers in wait()
  };

  // A file of `rows` zero rows in `folder`, its space reserved, and a ring of `ring_rows` rows.
  RowFile(const std::string& folder, int64_t rows, int64_t row_bytes, int64_t ring_rows, int threads);
  ~RowFile();  // only in the process that made it: see Owner
  RowFile(const RowFile&) = delete;
  RowFile& operator=(const RowFile&) = delete;

  // A deleter that lets go of nothing in a forked child: threads, and the locks they hold, are the parent's.
  struct Owner {
    void operator()(RowFile* file) const {
      if (getpid() == file->owner_) delete file;
    }
  };

  // File rows first .. first + rows - 1 into the ring from row `at`. A job starts when those in `after` have
  // succeeded, and fails when one of them has failed.
  Job read(int64_t first, int64_t rows, int64_t at, std::vector<Job> after);

  // Ring rows from[i] to file rows to[i].
  Job write(std::vector<int64_t> from, std::vector<int64_t> to, std::vector<Job> after);

  // True when a job has succeeded, false while it is under way; throws what it failed with.
  bool done(Job job);

  // Waits for a job; `interrupt` is called now and then and may throw. Throws what the job failed with.
  void wait(Job job, const std::function<void()>& interrupt);

  // More (zero) rows at the end of the file, once every job is done. Mappings made before keep the old size.
  void resize(int64_t rows, const std::function<void()>& interrupt);

  // Drops jobs not begun and joins the threads. Further calls throw.
  void close();

  std::shared_ptr<Pages> ring() const { return ring_; }
  std::shared_ptr<Pages> map();  // the whole file
  int64_t rows() const { return rows_; }
  int fd() const { return fd_; }
  Statistics statistics();

 private:
  struct Task {
    Job id;
    std::vector<Job> after;
    std::function<void()> copy;
  };

  Job submit(std::function<void()> copy, std::vector<Job> after);
  void work();
  void settle(std::unique_lock<std::mutex>& lock, Task& task);
  void wait_for(const std::function<bool()>& ready, const std::function<void()>& interrupt);
  void check_range(int64_t first, int64_t rows, int64_t limit, const char* what) const;
  void check_process() const;
  void reserve(int64_t rows);

  const std::string folder_;
  const int64_t row_bytes_, ring_rows_;
  int64_t rows_ = 0;
  int fd_ = -1;
  const pid_t owner_;  // threads do not live on in a forked child
  std::shared_ptr<Pages> ring_;

  std::mutex mutex_;
  std::condition_variable queued_, finished_;
  std::deque<Task> queue_;
  std::unordered_set<Job> pending_;
  std::unordered_map<Job, std::exception_ptr> failed_;  // kept: a later job may still name one in `after`
  Job last_ = 0;
  bool closed_ = false;
  Statistics statistics_;
  std::vector<std::thread> threads_;
};

}  // namespace dre_fast
