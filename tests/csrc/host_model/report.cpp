// What went wrong, in words.
#include <cstdarg>
#include <cstdio>
#include <string>

#include "model.hpp"

namespace fastlora::model {

namespace {

std::string message;

std::string format_words(const char* format, va_list arguments) {
  char text[1024];
  std::vsnprintf(text, sizeof text, format, arguments);
  return text;
}

__attribute__((format(printf, 1, 2))) std::string words(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string text = format_words(format, arguments);
  va_end(arguments);
  return text;
}

std::string name_of(const Cta& cta) {
  return grid->shape.blocks_y == 1 ? words("CTA %u", cta.x) : words("CTA (%u, %u)", cta.x, cta.y);
}

std::string name_of(const char* name, int index) {
  return index < 0 ? std::string(name) : words("%s[%d]", name, index);
}

std::string what_it_waits_for(const Thread& t) {
  switch (t.wait) {
    case Wait::BARRIER: {
      const auto& b = *static_cast<const Barrier*>(t.object);
      return words("waits for barrier %s phase parity %u (in phase %u, pending %u of %u arrivals, %ld bytes)",
                   name_of(b.name, b.index).c_str(), t.argument, b.phase, b.pending, b.arrivals, long(b.bytes));
    }
    case Wait::SYNC: {
      const auto& s = *static_cast<const SyncPoint*>(t.object);
      return words("waits at %s (%u of %u threads are there)", name_of(s.name, s.index > 0 ? s.index : -1).c_str(),
                   s.arrived, s.expected);
    }
    case Wait::WARP: {
      uint32_t exited = 0;
      for (uint32_t i = 0; i < 32; ++i) exited += t.cta->threads[t.warp->index * 32 + i].exited;
      return words("waits at %s (%u of 32 lanes are there, %u have exited)", t.warp->collective, t.warp->gathered,
                   exited);
    }
    case Wait::WGMMA:
      return "waits at wgmma_wait for the other threads of its warpgroup to issue the same wgmma";
    case Wait::REGISTERS:
      return words("waits for %u registers a thread (%u of the CTA's are free)", t.argument, t.cta->free_registers);
    case Wait::SPIN:
      return "is spinning on global memory";
    case Wait::NONE:
      return "is running";
  }
  return "";
}

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string text = format_words(format, arguments);
  va_end(arguments);
  if (current != nullptr && current->cta != nullptr) {
    text = name_of(*current->cta) + words(" warp %u lane %u: ", current->warp->index, current->lane) + text;
  }
  if (!grid->failed) message = std::move(text);
  grid->failed = true;
  if (current == nullptr) throw Failure();
  std::string().swap(text);
  current->fiber.suspend();
  __builtin_unreachable();
}

const char* failure_message() { return message.c_str(); }

void report_deadlock(const char* why) {
  constexpr int MOST_LINES = 64;
  std::string text = why;
  text += ":";
  int lines = 0;
  for (const Cluster& cluster : grid->clusters) {
    if (cluster.live == 0) continue;
    for (const Cta* cta : cluster.ctas) {
      for (const Warp& warp : cta->warps) {
        std::vector<std::pair<std::string, int>> groups;
        for (uint32_t lane = 0; lane < 32; ++lane) {
          const Thread& thread = cta->threads[warp.index * 32 + lane];
          if (thread.exited) continue;
          const std::string what = what_it_waits_for(thread);
          if (groups.empty() || groups.back().first != what) groups.emplace_back(what, 0);
          ++groups.back().second;
        }
        for (const auto& [what, lanes] : groups) {
          if (lines++ >= MOST_LINES) continue;
          text += "\n  " + name_of(*cta) + words(" warp %u", warp.index) +
                  (lanes == 32 ? std::string() : words(" (%d lane%s)", lanes, lanes == 1 ? "" : "s")) + " " + what;
        }
      }
    }
  }
  if (lines > MOST_LINES) text += words("\n  and %d lines more", lines - MOST_LINES);
  if (grid->next < grid->order.size()) {
    text += words("\n  %zu clusters have not started", grid->order.size() - grid->next);
  }
  message = text;
  grid->failed = true;
  throw Failure();
}

}  // namespace fastlora::model
