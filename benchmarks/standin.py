"""The small teacher and student of the benchmarks of speed: EfficientNet-Lite0 was trained with labels, and needs no download."""

from rob.student_train.students import StudentConfig
from rob.teacher_cache.teachers import TeacherConfig

STUDENT = StudentConfig("test_resnet", image_size=32, small_images=True)
TEACHER = TeacherConfig("efficientnet_lite0")
TEACHER_SIZE = 96
