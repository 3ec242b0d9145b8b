//! Maps a step to its code.

use super::lane::Lane;
use super::op::Op;
use super::report::Fault;
use crate::fuse::wire::ROOT;

impl Lane {
    pub(super) fn execute(&mut self, op: &Op) -> Result<(), Fault> {
        match op {
            Op::Lookup { path } => self.lookup(path),
            Op::Getattr { path } => self.getattr(path),
            Op::Mkdir { path, mode } => self.mkdir(path, *mode),
            Op::Mknod { path, fifo, mode } => self.mknod(path, *fifo, *mode),
            Op::Symlink { path, target } => self.symlink(path, target),
            Op::Readlink { path } => self.readlink(path),
            Op::Link { from, to } => self.link(from, to),
            Op::Unlink { path } => self.unlink(path),
            Op::Rmdir { path } => self.rmdir(path),
            Op::Rename { from, to, how } => self.rename(from, to, *how),
            Op::Chmod { path, mode } => self.chmod(path, *mode),
            Op::Chown { path, uid, gid } => self.chown(path, *uid, *gid),
            Op::Touch { path, mtime } => self.touch(path, *mtime),
            Op::SetXattr { path, name, value, how } => self.set_xattr(path, name, *value, *how),
            Op::GetXattr { path, name } => self.get_xattr(path, name),
            Op::ListXattrs { path } => self.list_xattrs(path),
            Op::RemoveXattr { path, name } => self.remove_xattr(path, name),
            Op::Forget { path } => self.forget(path),
            Op::ForgetDeleted { batch } => {
                let nodes = self.view.forget_deleted();
                self.send_forgets(&nodes, *batch)
            }
            Op::Statfs => Ok(self.fuse.statfs(ROOT).map(drop)?),
            Op::List { path, plus } => self.list(path, *plus),
            Op::OpenStream { path, stream } => self.open_stream(path, *stream),
            Op::ReadStream { stream, size, plus } => self.read_stream(*stream, *size, *plus),
            Op::CloseStream { stream } => self.close_stream(*stream),
            data => self.execute_on_data(data),
        }
    }

    fn execute_on_data(&mut self, op: &Op) -> Result<(), Fault> {
        match op {
            Op::Fstat { file } => self.fstat(*file),
            Op::Create { path, file, access, mode, exclusive } => self.create(path, *file, *access, *mode, *exclusive),
            Op::Open { path, file, access, truncate } => self.open(path, *file, *access, *truncate),
            Op::Close { file } => self.close(*file),
            Op::Fsync { file } => self.fsync(*file),
            Op::Read { file, offset, size } => self.read(*file, *offset, *size),
            Op::Write { file, offset, data } => self.write(*file, *offset, *data),
            Op::Truncate { path, size } => self.truncate(path, *size),
            Op::Ftruncate { file, size } => self.ftruncate(*file, *size),
            Op::Allocate { file, how, offset, len } => self.allocate(*file, *how, *offset, *len),
            Op::Seek { file, offset, hole } => self.seek(*file, *offset, *hole),
            Op::Copy { from, to, len } => self.copy(*from, *to, *len),
            Op::ReadShared { file, offset, size, forget } => self.read_shared(*file, *offset, *size, *forget),
            // The other operations are handled above.
            _ => Ok(()),
        }
    }
}
